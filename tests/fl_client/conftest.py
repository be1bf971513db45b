from flower_stack import flower_stack

__all__ = ["flower_stack"]
