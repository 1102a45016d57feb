"""TensorBoard, Weights & Biases and trackio, behind metrics.jsonl; see `reporting`."""
