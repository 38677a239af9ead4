"""What a trained model does inside."""
