"""Everything that touches the network: loading, prompts as tensors, scoring, generation, partial forwards."""
