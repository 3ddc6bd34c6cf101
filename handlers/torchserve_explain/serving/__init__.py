"""Requests, answers, settings, errors and pictures: everything between a client's bytes and the engine."""
