"""Prefix cache whose keys look as far ahead as the MTP layers do."""
