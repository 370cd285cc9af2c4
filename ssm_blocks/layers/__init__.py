"""The mixers, over ops/. Each file registers its names when it is imported; `ssm_blocks.build` does that on demand."""
