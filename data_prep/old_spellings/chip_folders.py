"""`python -m data_prep.chip_folders`: the old spelling of `python -m data_prep chip_folders`."""

from data_prep.__main__ import old_spelling

if __name__ == "__main__":
    old_spelling("chip_folders")
