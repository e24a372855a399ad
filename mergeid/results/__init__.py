"""What the verbs answer: frozen values with `to_json`."""
