"""The strongest small model that docs/BENCHMARKS.md found: LLaMA, tied, with QK-norm."""
arch_preset = "modern"
