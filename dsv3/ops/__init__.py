"""Mathematical functions of tensors and Python scalars: no config, no parameters, no mesh."""
