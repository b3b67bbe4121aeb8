"""`python -m data_prep.preview`: the old spelling of `python -m data_prep preview`."""

from data_prep.__main__ import old_spelling

if __name__ == "__main__":
    old_spelling("preview")
