"""Run a bundle without torch: numpy, onnxruntime, tokenizers and Pillow only."""
