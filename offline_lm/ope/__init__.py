"""What a critic is worth: diagnostics, and scores against exact truth."""
