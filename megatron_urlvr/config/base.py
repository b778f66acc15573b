"""The base class of every config section: unknown keys are errors, values are checked on assignment too."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A config section. Attribute docstrings are its documentation (`urlvr config show --docs`)."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, validate_default=True, use_attribute_docstrings=True
    )
