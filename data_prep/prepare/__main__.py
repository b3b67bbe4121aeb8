"""`python -m data_prep.prepare`: the old spelling of `python -m data_prep prepare`."""

from data_prep.__main__ import old_spelling

if __name__ == "__main__":
    old_spelling("prepare")
