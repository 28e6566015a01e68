"""Running one program on many devices: meshes, exchanges, and the model cut into pieces."""
