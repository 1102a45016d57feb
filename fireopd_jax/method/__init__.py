"""What a method is: scoring, filtering, reweighting and the loss, over the global batch."""
