"""`python -m data_prep.download`: the old spelling of `python -m data_prep download`."""

from data_prep.__main__ import old_spelling

if __name__ == "__main__":
    old_spelling("download")
