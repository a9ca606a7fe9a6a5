"""What tests of several modules use: small configs and models, ranks, hosts, faults and references."""
