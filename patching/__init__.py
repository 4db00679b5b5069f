"""Recipes of layers and the models made from them: initial students, pruned baselines, every size
in between.
"""
