"""`python -m data_prep.check`: the old spelling of `python -m data_prep check`."""

from data_prep.__main__ import old_spelling

if __name__ == "__main__":
    old_spelling("check")
