"""What a trained model does inside: attribution, knowledge neurons, interventions and edits."""
