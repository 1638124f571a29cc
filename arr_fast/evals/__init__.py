"""How good a judge is: accuracy, position bias and calibration on labelled data."""
