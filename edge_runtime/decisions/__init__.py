"""Decisions: rules over values, windows and model outputs. Pure but for the models, which are functions to it."""
