"""Post-training: rewards, and what learns from them. Nothing here loads TensorFlow by itself."""
