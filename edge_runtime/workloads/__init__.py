"""Workloads on this node: what it has for them (`capacity`), what is answered to desired state (`answers`), what makes it so (`runner`, by the `drivers`, from `images`), where one fits on a
cut-off site (`placement`). Imported only where configured.
"""
