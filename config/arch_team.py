"""model_v1, a preset kept for an existing line of models: LLaMA's components with a tied head."""
arch_preset = "team"
