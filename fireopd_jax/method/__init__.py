"""The stages of a method: scoring, filtering, reweighting and the loss, over the global batch."""
