"""Attacks by name."""

ATTACKS_REGISTRY = {}


def register_attack(name, config_cls):
    """Enters a class with its configuration's."""

    def enter(attack_cls):
        ATTACKS_REGISTRY[name] = (config_cls, attack_cls)
        return attack_cls

    return enter
