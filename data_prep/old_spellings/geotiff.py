"""`python -m data_prep.geotiff`: the old spelling of `python -m data_prep geotiff`."""

from data_prep.__main__ import old_spelling

if __name__ == "__main__":
    old_spelling("geotiff")
