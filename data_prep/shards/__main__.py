"""`python -m data_prep.shards`: the old spelling of `python -m data_prep shards`."""

from data_prep.__main__ import old_spelling

if __name__ == "__main__":
    old_spelling("shards")
