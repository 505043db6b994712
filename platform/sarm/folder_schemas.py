"""What the folders of the pipeline's stages hold: the `schema` that `manifest.json` gives, and that readers ask for.

Apart from the modules that read and write them, so that a job can refuse a folder of another kind before torch is loaded.
"""

CORPUS = "corpus/v1"
PAIRS = "pairs/v1"
ACTIVATIONS = "activations/v1"
SAE = "sae/v1"
SARM = "sarm/v1"
EVALUATION = "evaluation/v1"
CONTEXTS = "contexts/v1"
EXPLANATIONS = "explanations/v1"
PAGES = "feature_pages/v1"
