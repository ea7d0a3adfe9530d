def damage(tool, until): yield from ()
def malicious(tool, until): yield from ()
