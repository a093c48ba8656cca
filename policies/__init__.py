"""The policies: rules, calibrated, shipped, learned; and the calibration that feeds them."""
