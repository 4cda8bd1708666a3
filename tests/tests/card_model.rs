//! The 82576 model against a driver small enough to read: one that follows the book, and one broken rule a
//! test.
//!
//! The driver here is written from igb.md's recipe and shares no code with the product's, so the two check
//! each other through the card.

#![forbid(unsafe_code)]

mod card_model {
    mod bring_up;
    mod driver;
    mod faults;
    mod frames;
    mod process;
    mod rules;
}
