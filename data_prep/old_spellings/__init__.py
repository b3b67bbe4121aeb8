"""`python -m data_prep.STEP`: the old spelling of `python -m data_prep STEP`, where no package has the step's name."""
