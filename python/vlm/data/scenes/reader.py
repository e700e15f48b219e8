"""Read drawn scenes as if they were files: picture, captions, attributes, boxes, questions."""

from __future__ import annotations

from typing import Any

from vlm.data.scenes.draw import draw
from vlm.data.scenes.language import (
    attributes,
    captions,
    description,
    dialogue,
    inventory,
    long_caption,
    placed,
    questions,
    sentence,
)
from vlm.data.scenes.layout import MOST_OBJECTS, Scene, compose, scene_generator


class SceneReader:
    """Recipe: the index of the scene. spec: `key` of the set, `split`, `size` in pixels, `yes`, the percent of its answers."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.key = int(spec["key"])
        self.split = str(spec["split"])
        self.size = int(spec["size"])
        self.yes = int(spec.get("yes", 50)) / 100
        self.most = int(spec.get("objects", MOST_OBJECTS))

    def read(self, recipe: Any) -> dict[str, Any]:
        """Fields `image` (drawn), `caption`, `captions`, `description`, `long_caption`, `inventory`, `placed` (one object and
        where it is), `attributes`, `name` ("red circle"), `shape`, `color`, `category` (the shape), `concept` (the name), `count`, `objects`,
        `boxes`, `relations`, `questions`, `dialogue`."""
        scene, fields = self._scene(recipe)
        return {"image": draw(scene, self.size), **fields}

    def fields(self, recipe: Any) -> dict[str, Any]:
        """The same without the picture."""
        return self._scene(recipe)[1]

    def _scene(self, recipe: Any) -> tuple[Scene, dict[str, Any]]:
        generator = scene_generator(self.key, int(recipe))
        scene = compose(generator, self.split, self.most)
        draws = generator.random(8).tolist()
        texts = captions(scene)
        main = scene.things[0]
        asked = questions(scene, draws, self.yes)
        return scene, {
            "caption": texts[int(draws[7] * len(texts))],
            "captions": texts,
            "description": description(scene),
            "long_caption": long_caption(scene),
            "inventory": inventory(scene),
            "placed": placed(scene.things[int(draws[6] * len(scene.things))]),
            "attributes": attributes(scene),
            "name": main.name,
            "shape": main.shape,
            "color": main.color,
            "category": main.shape,
            "concept": main.name,
            "count": len(scene.things),
            "objects": [
                {"shape": t.shape, "color": t.color, "size": t.size, "box": t.box, "sentence": sentence(t)} for t in scene.things
            ],
            "boxes": [t.box for t in scene.things],
            "relations": [list(relation) for relation in scene.relations],
            "questions": asked,
            "dialogue": dialogue(scene, asked),
        }
