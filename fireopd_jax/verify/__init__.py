"""What the package computes against float64 NumPy, on the machine at hand: `fireopd verify`."""
