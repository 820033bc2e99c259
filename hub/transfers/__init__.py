"""Transfers between migration workers: who moves what, where it stands, and what becomes of it when a side dies."""
