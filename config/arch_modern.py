"""The best small model in docs/BENCHMARKS.md: LLaMA with a tied head and QK-norm."""
arch_preset = "modern"
