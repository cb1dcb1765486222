"""Making contrast data: the model's own answers, sorted or written under opposite instructions, filtered and measured."""
