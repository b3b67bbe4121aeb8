"""`python -m data_prep.gedi`: the old spelling of `python -m data_prep gedi`."""

from data_prep.__main__ import old_spelling

if __name__ == "__main__":
    old_spelling("gedi")
