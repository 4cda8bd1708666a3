#![doc = "Placeholder."]
pub mod wire;
