"""Stages that two or more methods stand on; they own their settings and know no method's Config."""
