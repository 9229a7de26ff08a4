"""Prompt formats: conversation -> segments -> token ids."""
