"""Criteria as data: what each kind claims about a picture, and whether it is true.

A claim is True, False or None on a scene. None means ambiguous (an object that is not there has no
colour; two centres that nearly align are neither left nor right): such a case is neither trained
nor measured. What is unambiguous is defined here and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from arr_fast.shapes.captions import Caption, Edit, Relation, relation_holds
from arr_fast.shapes.scene import Scene, SceneObject

T2I_KINDS = (
    "presence",
    "absence",
    "colour",
    "size",
    "count",
    "relation",
    "position",
    "background",
    "sharpness",
    "noise",
    "occlusion",
    "cut_off",
    "caption_objects",
    "caption_colours",
    "caption_count",
    "caption_relation",
    "caption_background",
    "caption_extra",
    "faithful",
    "overall",
)
EDIT_KINDS = ("edit_done", "edit_kept", "edit_overall")
FALSE_ON_STATIC = frozenset(
    {"presence", "noise", "caption_objects", "faithful", "overall", *EDIT_KINDS}
)
GLOBAL_KINDS = frozenset({"background", "sharpness", "noise", "occlusion", "cut_off"})


@dataclass(frozen=True, slots=True)
class Context:
    """What a criterion may refer to beside the picture: a caption, or a source and an edit."""

    caption: Caption | None = None
    source: Scene | None = None
    edit: Edit | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """One criterion without its wording.

    Attributes:
        kind: One of T2I_KINDS or EDIT_KINDS.
        first: (colour, shape) of the object it is about; "" stands for "any".
        second: The second object of a relation.
        value: A colour, size, number, place or relation, by kind.
    """

    kind: str
    first: tuple[str, str] = ("", "")
    second: tuple[str, str] = field(default=("", ""))
    value: str = ""

    def truth(self, scene: Scene, context: Context) -> bool | None:
        """Whether the claim holds on a scene; None where that is ambiguous."""
        if scene.is_static:
            return _on_static(self.kind)
        if not scene.objects and self.kind in ("sharpness", "occlusion", "cut_off"):
            return None
        if not scene.is_legible and self.kind not in GLOBAL_KINDS:
            return None
        return _TRUTHS[self.kind](self, scene, context)


def _on_static(kind: str) -> bool | None:
    """Pure noise shows nothing that a caption asks for."""
    return False if kind in FALSE_ON_STATIC else None


def matching(scene: Scene, kind: tuple[str, str]) -> list[SceneObject]:
    """The objects of a (colour, shape); "" stands for "any"."""
    colour, shape = kind
    return [o for o in scene.objects if colour in ("", o.colour) and shape in ("", o.shape)]


def _unique(scene: Scene, kind: tuple[str, str]) -> SceneObject | None:
    found = matching(scene, kind)
    return found[0] if len(found) == 1 else None


def _presence(claim: Claim, scene: Scene, _: Context) -> bool | None:
    return bool(matching(scene, claim.first))


def _absence(claim: Claim, scene: Scene, _: Context) -> bool | None:
    return not matching(scene, claim.first)


def _colour(claim: Claim, scene: Scene, _: Context) -> bool | None:
    obj = _unique(scene, ("", claim.first[1]))
    return None if obj is None else obj.colour == claim.value


def _size(claim: Claim, scene: Scene, _: Context) -> bool | None:
    obj = _unique(scene, claim.first)
    return None if obj is None else obj.size == claim.value


def _count(claim: Claim, scene: Scene, _: Context) -> bool | None:
    return len(matching(scene, claim.first)) == int(claim.value)


def _relation(claim: Claim, scene: Scene, _: Context) -> bool | None:
    first, second = _unique(scene, claim.first), _unique(scene, claim.second)
    if first is None or second is None:
        return None
    relation: Relation = claim.value  # type: ignore[assignment]
    return relation_holds(first, relation, second)


def _position(claim: Claim, scene: Scene, _: Context) -> bool | None:
    obj = _unique(scene, claim.first)
    if obj is None:
        return None
    along = obj.x if claim.value in ("left", "right") else obj.y
    if abs(along - 0.5) < 0.1:
        return None
    return (along < 0.5) == (claim.value in ("left", "top"))


def _background(claim: Claim, scene: Scene, _: Context) -> bool | None:
    return scene.background == claim.value


def _sharpness(_claim: Claim, scene: Scene, _: Context) -> bool | None:
    return scene.blur == 0


def _noise(_claim: Claim, scene: Scene, _: Context) -> bool | None:
    return scene.noise == 0


def _occlusion(_claim: Claim, scene: Scene, _: Context) -> bool | None:
    return scene.hidden is None


def _cut_off(_claim: Claim, scene: Scene, _: Context) -> bool | None:
    if any(o.is_cut for o in scene.objects):
        return False
    return True if all(o.is_inside for o in scene.objects) else None


def _caption_objects(_claim: Claim, scene: Scene, context: Context) -> bool | None:
    caption = _caption(context)
    return not caption.counts() - scene.kinds()


def _caption_colours(_claim: Claim, scene: Scene, context: Context) -> bool | None:
    caption = _caption(context)
    if Counter(s for _, s in caption.kinds) != Counter(o.shape for o in scene.objects):
        return None
    return caption.counts() == scene.kinds()


def _caption_count(_claim: Claim, scene: Scene, context: Context) -> bool | None:
    return len(scene.objects) == len(_caption(context).kinds)


def _caption_relation(_claim: Claim, scene: Scene, context: Context) -> bool | None:
    caption = _caption(context)
    if caption.relation is None:
        return None
    i, relation, j = caption.relation
    first, second = _unique(scene, caption.kinds[i]), _unique(scene, caption.kinds[j])
    if first is None or second is None:
        return None
    return relation_holds(first, relation, second)


def _caption_background(_claim: Claim, scene: Scene, context: Context) -> bool | None:
    wanted = _caption(context).background
    return None if wanted is None else scene.background == wanted


def _caption_extra(_claim: Claim, scene: Scene, context: Context) -> bool | None:
    """No object beyond the caption's; a swapped object is ambiguous, an added one is not."""
    caption = _caption(context)
    excess = scene.kinds() - caption.counts()
    if not excess:
        return True
    return False if len(scene.objects) > len(caption.kinds) else None


def _faithful(claim: Claim, scene: Scene, context: Context) -> bool | None:
    caption = _caption(context)
    if caption.counts() != scene.kinds():
        return False
    if _caption_background(claim, scene, context) is False:
        return False
    if caption.sizes is not None:
        wanted = Counter((*k, s) for k, s in zip(caption.kinds, caption.sizes, strict=True))
        if wanted != Counter((*o.kind, o.size) for o in scene.objects):
            return False
    return True if caption.relation is None else _caption_relation(claim, scene, context)


def _caption(context: Context) -> Caption:
    assert context.caption is not None, "this kind of claim needs a caption"
    return context.caption


def near(scene: Scene, obj: SceneObject) -> SceneObject | None:
    """The object whose centre lies where the given one has its own."""
    close = [o for o in scene.objects if abs(o.x - obj.x) + abs(o.y - obj.y) < 0.02]
    return close[0] if close else None


def same(a: SceneObject | None, b: SceneObject) -> bool:
    """Whether two objects agree in colour, shape and size."""
    return a is not None and a.kind == b.kind and a.size == b.size


def _edit_done(_claim: Claim, scene: Scene, context: Context) -> bool | None:
    source, edit = _edit(context)
    if edit.kind == "background":
        return scene.background == edit.value
    if edit.kind == "add":
        assert edit.added is not None
        return scene.kinds()[edit.added.kind] > source.kinds()[edit.added.kind]
    target = source.objects[edit.target]
    found = near(scene, target)
    if edit.kind == "remove":
        return found is None
    if found is None:
        return None
    wanted = edit.apply(source).objects[edit.target]
    if same(found, wanted):
        return True
    return False if same(found, target) else None


def _edit_kept(_claim: Claim, scene: Scene, context: Context) -> bool | None:
    """Every object but the target has its twin, nothing else is new, the background stayed."""
    source, edit = _edit(context)
    if edit.kind != "background" and scene.background != source.background:
        return False
    others = [o for i, o in enumerate(source.objects) if i != edit.target]
    if not all(same(near(scene, o), o) for o in others):
        return False
    places = list(source.objects) + ([edit.added] if edit.added is not None else [])
    return all(any(near(scene, p) is o for p in places) for o in scene.objects)


def _edit_overall(claim: Claim, scene: Scene, context: Context) -> bool | None:
    done, kept = _edit_done(claim, scene, context), _edit_kept(claim, scene, context)
    if done is False or kept is False:
        return False
    return None if done is None else True


def _edit(context: Context) -> tuple[Scene, Edit]:
    assert context.source is not None and context.edit is not None, "this claim needs an edit"
    return context.source, context.edit


_TRUTHS: dict[str, Callable[[Claim, Scene, Context], bool | None]] = {
    "presence": _presence,
    "absence": _absence,
    "colour": _colour,
    "size": _size,
    "count": _count,
    "relation": _relation,
    "position": _position,
    "background": _background,
    "sharpness": _sharpness,
    "noise": _noise,
    "occlusion": _occlusion,
    "cut_off": _cut_off,
    "caption_objects": _caption_objects,
    "caption_colours": _caption_colours,
    "caption_count": _caption_count,
    "caption_relation": _caption_relation,
    "caption_background": _caption_background,
    "caption_extra": _caption_extra,
    "faithful": _faithful,
    "overall": _faithful,
    "edit_done": _edit_done,
    "edit_kept": _edit_kept,
    "edit_overall": _edit_overall,
}
