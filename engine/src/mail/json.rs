//! A JSON object, and nothing that stands in for one.
//!
//! serde reads a structure from an array as well, by the places of its fields: `["acme", null]` would be a tenant. No
//! document of ours offers that, and which place means what would change with each new field.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

/// `T` as a JSON object has it; anything but an object is an error.
#[derive(Debug)]
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ObjectVisitor(PhantomData)).map(Self)
    }
}

struct ObjectVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
    type Value = T;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Pair {
        first: u32,
        #[serde(default)]
        second: Option<u32>,
    }

    #[test]
    fn only_an_object_is_one() {
        let read = |text: &str| serde_json::from_str(text).map(|Object(Pair { first, second })| (first, second));
        assert_eq!(read(r#"{"second":2,"first":1}"#).unwrap(), (1, Some(2)));
        assert_eq!(read(r#"{"first":1}"#).unwrap(), (1, None));
        for (text, wrong) in [
            ("[1,2]", "invalid type: sequence, expected an object at line 1 column 0"),
            ("null", "invalid type: null, expected an object at line 1 column 4"),
            (r#"{"first":1,"first":1}"#, "duplicate field `first` at line 1 column 18"),
            (r#"{"first":1,"third":3}"#, "unknown field `third`, expected `first` or `second` at line 1 column 18"),
            (r#"{"first":1}2"#, "trailing characters at line 1 column 12"),
        ] {
            assert_eq!(read(text).unwrap_err().to_string(), wrong);
        }
    }
}
