"""smol-llava: SmolLM2-135M-Instruct, which is installed as a package, behind a vision tower trained here."""
