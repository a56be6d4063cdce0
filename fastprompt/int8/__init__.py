"""The frozen Linears of a ViT in int8, for CPUs: rounding, calibration, the file that holds them, and their product."""
