"""`python -m data_prep.splits`: the old spelling of `python -m data_prep splits`."""

from data_prep.__main__ import old_spelling

if __name__ == "__main__":
    old_spelling("splits")
