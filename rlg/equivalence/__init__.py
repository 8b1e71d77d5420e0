"""Experiment: does w play the KL coefficient beta / w?"""
