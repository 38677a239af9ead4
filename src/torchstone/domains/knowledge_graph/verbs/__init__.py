"""Knowledge graphs: ask a trained run for the missing end of a triple."""
