"""The model card that sentence-transformers writes of a checkpoint, without paths of training rows."""

from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

from files.items import is_stored
from files.named import medium_named

MEDIA = ("image", "video", "image_url", "video_url")


class CardData(SentenceTransformerModelCardData):
    """Says what a picture or clip is, not where it lies; its example loads with trust_remote_code."""

    @classmethod
    def taking_over(cls, data):
        """Everything that a SentenceTransformerModelCardData knows."""
        card = cls()
        vars(card).update(vars(data))
        return card

    def __reduce__(self):
        """As its base class: a process that gets a pickle may not find our modules, and writes no card."""
        return SentenceTransformerModelCardData, (), vars(self)

    def __deepcopy__(self, memo):
        return self.taking_over(self)

    def set_widget_examples(self, dataset):
        """None: it would take the values of rows, paths among them, for texts."""

    @staticmethod
    def _format_example_value(value):
        return SentenceTransformerModelCardData._format_example_value(without_paths(value))

    def generate_usage_snippet(self):
        return super().generate_usage_snippet().replace('")\n# Run', '", trust_remote_code=True)\n# Run', 1)


def without_paths(value):
    """A value of a training row, in which a word stands in place of each picture and clip."""
    if isinstance(value, bytes) or is_stored(value):
        return "&lt;image&gt;"
    if isinstance(value, dict):
        return {key: f"&lt;{key.removesuffix('_url')}&gt;" if key in MEDIA and part is not None
                else without_paths(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(part) for part in value]
    if isinstance(value, str) and medium_named(value):
        return "&lt;the name of a file&gt;"
    return value
