"""`python -m data_prep.composite`: the old spelling of `python -m data_prep composite`."""

from data_prep.__main__ import old_spelling

if __name__ == "__main__":
    old_spelling("composite")
