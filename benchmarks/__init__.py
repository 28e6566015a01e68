"""The benchmark beside transformers' DeepseekV3: cases, the two workers, how they are driven, and the report."""
